"""Tests of `workers`: the scoring side."""
