"""The ground floor: data types, names, cards, the registry, key tables."""
