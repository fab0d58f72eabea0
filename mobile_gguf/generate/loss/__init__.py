"""Mode auto: what it costs to lose experts is foreseen, spent within a budget, and audited."""
