"""Optimizers that tests elsewhere dropped within a step still watch until they are collected."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def nothing_else_watches():
    gc.collect()
