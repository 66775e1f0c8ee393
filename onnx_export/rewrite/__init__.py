"""Put nsq.Attention into a decoder that somebody else exported."""
