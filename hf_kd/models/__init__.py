"""Students and teachers: loading, preprocessing, feature layers and the auxiliary head."""
