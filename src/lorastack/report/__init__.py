"""Pages with plots; the only package that imports plotly."""
