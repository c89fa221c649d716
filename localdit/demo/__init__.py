"""The web page of `localdit demo`: draw, edit and inpaint in the browser."""
