"""The backbone families, by what their checkpoints look like on disk."""

from tools.convert_torch_weights import flux2_layout, flux_layout

LAYOUTS = (flux_layout.LAYOUT, flux2_layout.LAYOUT)
