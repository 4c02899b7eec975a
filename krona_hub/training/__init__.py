"""Training of Kronecker adapters: settings, data, families of models, the loop, and how it goes on after a stop."""
