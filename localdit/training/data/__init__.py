"""Training data: finding samples, recognising broken ones, buckets, and the order of visits."""
