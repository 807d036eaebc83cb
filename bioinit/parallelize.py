"""Strategies: how a model on meta is divided among ranks, before any of it has memory."""

from __future__ import annotations
