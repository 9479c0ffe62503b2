"""Clips: frames of a video, chosen by the times at which they are shown, cut alike, and encoded together."""
