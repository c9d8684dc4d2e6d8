"""All that holds device memory: meshes, programs, KV pools, sampling, hand-overs, and the executor that runs them."""
