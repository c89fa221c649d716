"""Training data: finding samples, telling broken ones, buckets, and the order of visits."""
