"""The exporter's tests look at bundles that this exporter made: what is checked in was made by another version."""

from unets import (  # noqa: F401 (fixtures)
    bundle_path,
    edited_bundle_path,
    learned_bundle_path,
    plain_bundle_path,
    sized_bundle_path,
    small_bundle_path,
)
