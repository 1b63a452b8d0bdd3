"""A small Hugging Face Hub on loopback, for tests that push and load with the real client.

It speaks the endpoints that ``huggingface_hub`` and ``transformers`` call for models: accounts,
repositories, branches, tags, listings, commits, and large files by the basic transfer of the LFS
protocol. As on the Hub, large files lie at another host (here by its name only), which refuses
requests that carry a token. There are no pull requests, rights of organisations or Xet storage.

The client prefers Xet where ``hf_xet`` is installed, and reads ``HF_HUB_DISABLE_XET``,
``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HOME`` once, when it is imported. A push or load as a user
does it therefore belongs in a subprocess with :meth:`LocalHub.environment`. In the tests' own
process ``HfApi(endpoint=hub.url, token=...)`` will do, and uploads there need
``huggingface_hub.constants.HF_HUB_DISABLE_XET`` set. The client tries a cut upload again up to five
times, after 1, 2, 4, 8 and 8 seconds; a cut download after one second, and a commit never.

    with LocalHub(tokens={"hf_good"}) as hub:
        hub.cut_uploads(times=1, after_bytes=1000)
        subprocess.run([...], env=hub.environment(tmp_path / "home", "hf_good"), check=True)
        assert not hub.faults  # it has happened
        assert hub.files("org/name")["config.json"] == expected

One job a file: ``state`` is what a Hub keeps, ``faults`` what goes wrong on request, ``hub`` the
whole for a test, ``server`` the socket, ``request`` what is read and answered there. The endpoints
are functions that ``routing`` finds: ``accounts``, ``listings``, ``branches``, ``commits`` and
``contents``.
"""

from tests.local_hub.hub import LocalHub

__all__ = ["LocalHub"]
