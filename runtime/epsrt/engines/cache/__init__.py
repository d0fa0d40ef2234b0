"""The engine cache: native code that was built here, and the records that vouch for it."""
