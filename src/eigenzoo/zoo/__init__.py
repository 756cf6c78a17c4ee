"""A zoo: many models as one collection, matched layer by layer and read in blocks."""

from eigenzoo.zoo.zoo import Zoo, open_zoo

__all__ = ["Zoo", "open_zoo"]
