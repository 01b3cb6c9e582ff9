"""The store of secrets: write-only for everybody but a call whose policy grants one, encrypted on disk."""

from sandboxd.secrets.key import KeyPlace, place_of
from sandboxd.secrets.store import MAX_GRANTED, MAX_VALUE, SecretStore, Value

__all__ = ["MAX_GRANTED", "MAX_VALUE", "KeyPlace", "SecretStore", "Value", "place_of"]
