"""The parts of the checked face, one per concern; `edgetune_native.face.Face` is all of them."""
