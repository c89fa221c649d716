from hypothesis import settings

# A shared machine may be slow at any moment: how long an example takes says nothing.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
