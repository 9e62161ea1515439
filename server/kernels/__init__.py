"""Pool partials and their combination over a paged KV cache; knows tensors only."""
