"""What client and service share: JSON documents, media types, headers, problems, and tensors as bytes."""
