"""The geometry of points in feature space: class means and their spread, shared directions, similarity of two
spaces.

Rule of the room: sums in float64, over blocks of rows, so that memory does not grow with the number of points.
"""

__all__ = ["class_geometry", "class_stream", "pairing", "similarity"]
