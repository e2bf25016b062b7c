"""A Hub on 127.0.0.1 for tests: what huggingface_hub 2.4, transformers, timm and datasets ask for, and planned faults.

    with LocalHub(tmp_path / "hub") as hub:
        sha = hub.add_repo("facebook/deit-tiny-patch16-224", deit_tiny(tmp_path / "deit"))
        hub.add_repo("uoft-cs/cifar100", cifar100(tmp_path / "cifar100"), repo_type="dataset")
        hub.add_token("hf_anna", user="anna")
        hub.fail(r"POST .*/commit/", 500)
        subprocess.run(command, env=os.environ | hub.env(tmp_path / "cache", token="hf_anna"))
        assert hub.commits("anna/student")[0] == "Upload the student"

It was written from what the clients ask for and accept and from what is known of the Hub, without the Hub at hand: a
test against it shows that a client gets along with these answers, not that the Hub gives them. It does not check, or
does otherwise than the Hub:

- TLS, proxies, speed, real rate limits, quotas, billing, and files so large that they need a multipart upload;
- Xet: large files go by plain LFS, for which clients must have HF_HUB_DISABLE_XET=1 (`env` and `patch` see to it);
- the metadata of cards (`validate-yaml` accepts everything), malware and pickle scans, the .gitattributes and
  .gitignore of a repository (whether a file is LFS follows from its suffix and size), names of repositories;
- redirects of small files and of renamed repositories, compression, pages of long lists, sorting and filters other
  than `search` (all words must be in the id, where the Hub has an index), `author` and `limit`;
- pull requests, discussions, git itself, web pages, the dataset viewer and its parquet export;
- access: a gated repository gives no file to whom it was not granted (`grant`, members of the owner), whatever a
  fine-grained token says of gated repositories; of its permissions only repo.content.read and repo.write count, for a
  user, an organisation or one repository; a member of an organisation has one role in all of its repositories.

What `deit_tiny`, `cifar100` and `imagenet` make has the real ones' files and forms, not their contents.
"""

import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
import time
from pathlib import Path

from hub_records import BODY_FAULTS, LFS_SUFFIXES, Commit, Fault, File, Repo, Token, history, is_lfs, pointer
from hub_routes import Handler, Server

GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class LocalHub:
    """See the module's docstring.

    Args:
        folder: empty or new; keeps the content of the files.

    Attributes:
        endpoint: "http://127.0.0.1:PORT".
        requests: list of (method, path with query), oldest first.
        delay: seconds between the pieces of a body that comes slowly.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.repos, self.tokens, self.faults, self.requests = {}, {}, [], []
        self.delay = 0.05
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.connections = set()
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # Under another name, as the Hub's storage is: clients must not send their token there.
        self.storage = f"http://localhost:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """The end, also for connections that are kept alive: from now on nobody answers at `endpoint`."""
        if self.closing.is_set():
            return
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):  # its client may have been quicker
                    connection.shutdown(socket.SHUT_RDWR)

    def env(self, cache_folder, token=None):
        """Variables to put over `os.environ` for a process that shall know this Hub alone; no token unless given."""
        cache = Path(cache_folder)
        proxies = [f"{scheme}_proxy" for scheme in ("http", "https", "all")]
        return dict.fromkeys([*proxies, *map(str.upper, proxies)], "") | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_DATASETS_CACHE": str(cache / "datasets"),
            "HF_MODULES_CACHE": str(cache / "modules"),
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HUGGINGFACE_CO_STAGING": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def patch(self, monkeypatch, cache_folder, token=None):
        """The same for this very process, until pytest's `monkeypatch` undoes it: huggingface_hub, transformers and
        datasets, which read their addresses at import. For what they read at import and nowhere else, use `env`."""
        import datasets
        import transformers.utils.hub  # noqa: F401, that it is loaded with its own addresses, not with these
        from huggingface_hub import HfFileSystem, constants, hf_api
        from huggingface_hub.utils import close_session

        env = self.env(cache_folder, token)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", env["HF_HUB_CACHE"])
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", env["HF_TOKEN_PATH"])
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", env["HF_TOKEN_PATH"] + "s")
        for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
            monkeypatch.setattr(constants, name, True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)
        monkeypatch.setattr(hf_api.api, "_whoami_cache", {})
        monkeypatch.setattr(sys.modules["transformers.utils.hub"], "_hf_api", None)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.endpoint)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(env["HF_DATASETS_CACHE"]))
        for name in ("DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
            monkeypatch.setattr(datasets.config, name, Path(env["HF_DATASETS_CACHE"], "downloads"))
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()  # of a Hub that had the same port
        close_session()  # it may know a proxy

    def add_repo(self, repo_id, files, repo_type="model", gated=False, private=False):
        """Makes a repository, or a further commit of one; returns the commit's sha (40 hex digits).

        Args:
            repo_id: "owner/name".
            files: a folder, or a dict of path: bytes or text. A further commit puts them in the place of all files.
            repo_type: "model" or "dataset".
            gated: False, or True, "auto" or "manual". This and `private` count when the repository is made.
        """
        if not isinstance(files, dict):
            root = Path(files)
            files = {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        with self.lock:
            repo = Repo(repo_id, repo_type, private, "auto" if gated is True else gated)
            repo = self.repos.setdefault((repo_type, repo_id), repo)
            entries = {".gitattributes": self.put(GITATTRIBUTES, False)}
            for path, data in files.items():
                data = data.encode() if isinstance(data, str) else data
                entries[path] = self.put(data, is_lfs(path, len(data)))
            return self.add_commit(repo, "main", "Upload files" if repo.commits else "initial commit", entries).sha

    def add_token(self, token, user, role="write", scopes=None, orgs=()):
        """Makes a token known.

        Args:
            role: "read", "write" or "fineGrained".
            scopes: of a fine-grained token, such as
                {"user:anna": ["repo.write"], "org:lab": ["repo.content.read"], "model:lab/x": ["repo.write"]}.
            orgs: names of the user's organisations (with the right to write), or a dict of name: "read", "write", ...
        """
        orgs = dict(orgs) if isinstance(orgs, dict) else dict.fromkeys(orgs, "write")
        self.tokens[token] = Token(user, role, dict(scopes or {}), orgs)

    def revoke(self, token):
        """From now on the token is as unknown as one that never was."""
        del self.tokens[token]

    def grant(self, repo_id, user, repo_type="model"):
        """Lets a user read a gated repository."""
        self.repos[repo_type, repo_id].granted.add(user)

    def fail(self, pattern, kind, times=1):
        """Plans a fault, and returns it: `.hits` counts the requests that met it.

        Args:
            pattern: regular expression, searched for in "METHOD /path?query". Content of LFS files is at
                "/lfs/SHA256/path", everything else of a file at "/OWNER/NAME/resolve/REVISION/path".
            kind: a status, such as 401 (token refused), 403 (gated, or without the right to write), 404, 429 (with
                Retry-After: 1), 500; or "drop" (closed without an answer); or of the body of a file: "cut" (closed
                half-way), "slow" (in 10 pieces with `delay` between them), "stall" (silent from half-way on).
            times: how many requests meet it, the first that match; None for all.
        """
        fault = Fault(re.compile(pattern), kind, float("inf") if times is None else times)
        self.faults.append(fault)
        return fault

    def files(self, repo_id, revision="main", repo_type="model"):
        """`{path: bytes}` of a revision, with the .gitattributes that every repository begins with."""
        files = self.repos[repo_type, repo_id].commit(revision).files
        return {path: self.get(file.sha256) for path, file in files.items()}

    def commits(self, repo_id, revision="main", repo_type="model"):
        """Messages of the commits, newest first."""
        return [commit.message for commit in history(self.repos[repo_type, repo_id], revision)]

    # What the routes work with.

    def put(self, data, lfs):
        sha256 = hashlib.sha256(data).hexdigest()
        if not (self.folder / sha256).exists():
            (self.folder / sha256).write_bytes(data)
        return self.file(sha256, lfs)

    def get(self, sha256):
        return (self.folder / sha256).read_bytes()

    def file(self, sha256, lfs):
        data = self.get(sha256)
        blob = pointer(sha256, len(data)) if lfs else data
        return File(sha256, len(data), hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest(), lfs)

    def add_commit(self, repo, branch, message, files):
        parent, date = repo.branches.get(branch), time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        listing = json.dumps([repo.id, parent, message, {path: file.oid for path, file in sorted(files.items())}])
        sha, card = hashlib.sha1(listing.encode()).hexdigest(), {}
        if repo.type == "model" and "README.md" in files:
            metadata = self.get(files["README.md"].sha256).decode(errors="replace").partition("\n---")[0]
            card = dict(re.findall(r"^(pipeline_tag|library_name): *([\w-]+)", metadata, re.M))
        commit = repo.commits[sha] = Commit(sha, message, dict(sorted(files.items())), parent, date, card)
        repo.branches[branch] = sha
        return commit

    def fault(self, request, of_body=False):
        """The kind of the fault planned for this request, or None."""
        with self.lock:
            for fault in self.faults:
                if fault.left > 0 and (fault.kind in BODY_FAULTS) == of_body and fault.pattern.search(request):
                    fault.left -= 1
                    fault.hits += 1
                    return fault.kind


# What tests serve under the real ids.

FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
""".split()
COARSE = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture
insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores
medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
""".split()


def deit_tiny(folder, seed=0, layers=3):
    """A random facebook/deit-tiny-patch16-224 of hidden size 32 for 32 px; returns `folder`.

    Like the real one it is a ViT (`model_type` "vit") with ImageNet's 1000 classes, the same files, names of weights
    and kind of processor. Unlike it, it has learnt nothing, and its width, depth, patches and images are small: what
    it scores, how long it takes and what it needs of memory say nothing about the real one.
    """
    import timm
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    info = timm.data.ImageNetInfo()
    names = [info.index_to_description(i, detailed=False) for i in range(1000)]
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ViTForImageClassification(config).save_pretrained(folder)
    pixels = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
    steps = {"do_resize": True, "size": 36, "do_center_crop": True, "crop_size": 32, "do_normalize": True}
    processor = {"feature_extractor_type": "DeiTFeatureExtractor"} | steps | pixels
    Path(folder, "preprocessor_config.json").write_text(json.dumps(processor))
    card = "---\nlicense: apache-2.0\npipeline_tag: image-classification\nlibrary_name: transformers\n---\n\n# DeiT\n"
    Path(folder, "README.md").write_text(card)
    return Path(folder)


def imagenet(folder, n_train=48, n_test=16, shards=7, seed=0):
    """A random ILSVRC/imagenet-1k with columns, features and kinds of files of the real one; returns `folder`.

    JPEGs of several sizes, some of them grey or CMYK, in row groups of 4 rows. The train split has `shards` files.
    """
    import io

    import numpy as np
    import pyarrow.parquet as pq
    import timm
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PIL

    info, rng = timm.data.ImageNetInfo(), np.random.default_rng(seed)
    names = [info.index_to_description(i, detailed=True) for i in range(1000)]
    features = Features(image=Image(), label=ClassLabel(names=names))
    Path(folder, "data").mkdir(parents=True)
    for split, count, files in (("train", n_train, shards), ("validation", n_test, 1)):
        encoded = []
        for i in range(count):
            buffer, size = io.BytesIO(), tuple(rng.integers(30, 60, 2).tolist())
            pixels = PIL.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            pixels.convert(("RGB", "RGB", "L", "CMYK")[i % 4]).save(buffer, "JPEG")
            encoded.append({"bytes": buffer.getvalue(), "path": f"{split}_{i}.JPEG"})
        columns = {"image": encoded, "label": rng.integers(0, 1000, count).tolist()}
        table = Dataset.from_dict(columns, features=features).with_format("arrow")
        for i, rows in enumerate(np.array_split(np.arange(count), files)):
            path = Path(folder, "data", f"{split}-{i:05d}-of-{files:05d}.parquet")
            pq.write_table(table[rows.tolist()], path, row_group_size=4)
    return Path(folder)


def cifar100(folder, n_train=200, n_test=100, seed=0):
    """A random uoft-cs/cifar100 with columns, features and files of the real one; returns `folder`.

    Labels go round through the 100 classes; which coarse class a fine one belongs to is made up. An image is noise
    around a colour that belongs to its class, so that a model can learn a little; scores say nothing about the real
    images, of which there are none here.
    """
    import numpy as np
    import yaml
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PIL

    rng = np.random.default_rng(seed)
    features = Features(img=Image(), fine_label=ClassLabel(names=FINE), coarse_label=ClassLabel(names=COARSE))
    colours, sizes, splits = rng.integers(40, 216, (100, 3)), {"train": n_train, "test": n_test}, []
    for split, size in sizes.items():
        labels = np.arange(size) % 100
        noise = rng.normal(0, 30, (size, 32, 32, 3))
        pixels = (colours[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8)
        columns = {"img": [PIL.fromarray(p) for p in pixels], "fine_label": labels, "coarse_label": labels // 5}
        path = Path(folder, "cifar100", f"{split}-00000-of-00001.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(path)
        splits.append({"name": split, "num_bytes": path.stat().st_size, "num_examples": size})
    info = {"config_name": "cifar100", "features": features._to_yaml_list(), "splits": splits}
    files = [{"split": split, "path": f"cifar100/{split}-*"} for split in sizes]
    card = {"dataset_info": info, "configs": [{"config_name": "cifar100", "data_files": files, "default": True}]}
    Path(folder, "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n\n# CIFAR-100\n")
    return Path(folder)
