"""Load a base: device, precision, 4-bit weights, attention, architecture, layer-wise forward."""
