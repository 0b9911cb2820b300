"""Tests of `tasks`: the contract."""
