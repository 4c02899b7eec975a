"""The index of the catalog is that of the catalog as it is: a stale one hides base models from detection."""

from krona_hub.bases import catalog, catalog_index
from krona_hub.bases.families import FAMILIES


def test_the_shipped_index_is_that_of_the_catalog():
    assert catalog_index.PATH.read_text("utf-8") == catalog_index.as_text(catalog_index.build())


def test_every_base_model_is_found_by_its_fingerprint():
    assert all(name in catalog_index.bases_with(catalog.get(name).fingerprint) for name in catalog.names())


def test_every_component_is_found_by_a_name_of_its_modules():
    for family in FAMILIES.values():
        for component, file in family.components.items():
            path = next(iter(catalog.component(file).modules))
            assert file in catalog_index.components_with(f"{component}.{path}")
