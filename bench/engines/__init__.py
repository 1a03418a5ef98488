"""What servers run on and with: the CPU engine, the small model, an emulated link, emulated hosts."""
