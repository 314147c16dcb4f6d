"""Loads the pack as package `storyweft` and puts ComfyUI on the path before any test is collected."""
import loading  # noqa: F401
