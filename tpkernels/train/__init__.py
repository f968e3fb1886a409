"""The training job: a small language model over ranks and replicas, resumed from checkpoints."""
