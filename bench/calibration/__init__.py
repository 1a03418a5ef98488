"""The constants of the time model: fitted to measurements, and compared with all of them."""
