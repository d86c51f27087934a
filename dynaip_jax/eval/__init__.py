"""Measuring what comes out."""
