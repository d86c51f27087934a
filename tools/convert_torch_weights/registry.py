"""The backbone families, by what their checkpoints look like on disk."""

from tools.convert_torch_weights import flux_layout

LAYOUTS = (flux_layout.LAYOUT,)
