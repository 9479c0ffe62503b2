"""Pictures over HTTP: a model's engine, its adapters, and the application that Ray Serve runs."""
