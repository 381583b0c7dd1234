"""Tables and pictures made from a log's trials."""
