"""SGLang: its tables and dispatch, and the plugin."""
