"""How a model's server is named in the settings: apart from its SDK, so that it can be checked early."""

from urllib.parse import urlsplit

from contextd.settings import SettingsError, environment_name


def checked_key(key: str | None) -> str | None:
    """`key` as a header can hold it: an error of the HTTP client's would quote it.

    Raises `SettingsError`.
    """
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise SettingsError(f"{environment_name('openai_api_key')}: holds what no key can hold")
    return key or None


def checked_url(url: str) -> str:
    """Raises `SettingsError` for what is no URL of a server."""
    try:
        parts = urlsplit(url)
        clean = url.isascii() and url.isprintable() and " " not in url  # `urlsplit` drops some
        valid = clean and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        name = environment_name("openai_base_url")
        raise SettingsError(f"{name}: expected a URL such as http://127.0.0.1:8080/v1")
    return url
