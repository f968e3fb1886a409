"""A server of a model that is cut over ranks: OpenAI's HTTP interface in front, one batch of slots behind."""
