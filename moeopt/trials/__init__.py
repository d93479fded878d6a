"""What a trial and a study hold in their attributes: genotype, facts, description, guide. Imports `plan` and below."""
