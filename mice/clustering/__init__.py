"Clusters of a user's own images: the estimator, the choice of K, tables, the report, whole folders."
