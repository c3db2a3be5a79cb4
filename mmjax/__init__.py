"""mmjax trains multimodal models in stages, on JAX."""

__version__ = '0.1.0'
