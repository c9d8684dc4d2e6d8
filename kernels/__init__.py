"""Operations on the paged KV pool: one folder each, with the plain definition, its fast forms, and one interface."""
