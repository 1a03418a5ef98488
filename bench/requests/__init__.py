"""What routing requests to the ranks that hold their experts would gain: an offline study on recorded traces."""
