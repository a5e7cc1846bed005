# SPDX-License-Identifier: Apache-2.0
"""The loopback hub is faithful to the unmodified client of the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "cocoa-tiny"
README = b"---\nlicense: apache-2.0\ntags:\n- cocoa\nlibrary_name: sentence-transformers\n---\n\n# A model\n"
FILES = {
    "README.md": README,
    "config.json": b'{"a": 1}',
    "empty.txt": b"",
    "model.safetensors": bytes(place * place // 7 % 251 for place in range(10_240)),
    "assets/plot.png": b"\x89PNG\r\n\0" + b"picture" * 30,
    "1_Pooling/config.json": b"{}",
}


def additions(files: dict[str, bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name, data) for name, data in files.items()]


@pytest.fixture
def repo(api, hub):
    """An empty model `org/model`."""
    api.create_repo("org/model")
    return hub.repository("org/model")


@pytest.fixture
def full(api, repo):
    """The same with files."""
    api.create_commit("org/model", additions(FILES), commit_message="files")
    return repo


def uploaded(repo) -> dict[str, bytes]:
    """What is in the repository, apart from what the Hub itself writes."""
    return {name: data for name, data in repo.head().files.items() if name != ".gitattributes"}


def paths(hub, method: str) -> list[str]:
    return [path for asked, path in hub.requests if asked == method]


# Repositories


def test_whoami_and_creation(api, hub):
    who = api.whoami()
    assert (who["name"], [organization["name"] for organization in who["orgs"]]) == ("someone", ["org"])
    url = api.create_repo("org/model")
    assert (url, url.repo_id, url.repo_type) == (f"{hub.endpoint}/org/model", "org/model", "model")
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as error:
        api.create_repo("org/model")
    assert error.value.response.status_code == 409
    assert api.create_repo("org/model", exist_ok=True).repo_id == "org/model"
    assert api.create_repo("own").repo_id == "someone/own"
    assert api.create_repo("org/model", repo_type="dataset").repo_id == "org/model"
    with pytest.raises(HfHubHTTPError, match="403 Forbidden.*rights to create a model"):
        api.create_repo("another/model")
    assert api.list_repo_files("org/model") == [".gitattributes"]
    assert not hub.unknown


def test_private_repository_exists_for_the_token_only(api, hub):
    api.create_repo("org/secret", private=True)
    hub.repository("org/secret").push({"config.json": b"{}", "model.safetensors": b"weights"})
    assert api.model_info("org/secret").private
    assert Path(hf_hub_download("org/secret", "model.safetensors")).read_bytes() == b"weights"
    anonymous = HfApi(token=False)
    for repo_id in ("org/secret", "org/nothing"):
        with pytest.raises(RepositoryNotFoundError, match="Invalid username or password.") as error:
            anonymous.model_info(repo_id)
        assert error.value.response.status_code == 401
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(repo_id, "config.json", token=False)
        assert not anonymous.repo_exists(repo_id)
    with pytest.raises(RepositoryNotFoundError) as error:
        api.model_info("org/nothing")
    assert error.value.response.status_code == 404


def test_nobody_writes_without_a_token(api, full):
    head, anonymous = full.head(), HfApi(token=False)
    assert anonymous.model_info("org/model").sha == head.oid
    with pytest.raises(RepositoryNotFoundError, match="Invalid username or password."):
        anonymous.create_commit("org/model", additions({"a.txt": b"a"}), commit_message="mine")
    with pytest.raises(HfHubHTTPError, match="Invalid username or password."):
        anonymous.create_repo("org/another")
    assert full.head() is head


def test_storage_takes_signed_addresses_only(api, hub, full):
    metadata = get_hf_file_metadata(hf_hub_url("org/model", "model.safetensors"))
    assert metadata.location.startswith(hub.storage)
    assert get_session().get(metadata.location).content == FILES["model.safetensors"]
    assert get_session().get(metadata.location.partition("?")[0]).status_code == 403
    assert get_session().get(metadata.location, headers={"Authorization": f"Bearer {hub.token}"}).status_code == 400


@pytest.mark.parametrize("chunk_size", [5_000_000, 4096], ids=["basic", "multipart"])
def test_upload_and_download(api, hub, repo, chunk_size):
    hub.chunk_size = chunk_size
    before = repo.head().oid
    commit = api.create_commit("org/model", additions(FILES), commit_message="files", parent_commit=before)
    assert commit.oid == repo.head().oid != before
    assert commit.repo_url.repo_id == "org/model"
    assert uploaded(repo) == FILES
    in_lfs = {name for name, blob in repo.head().blobs.items() if blob.lfs}
    assert in_lfs == {"model.safetensors", "assets/plot.png"}
    parts = [path for path in paths(hub, "PUT") if path.rpartition("/")[2] in ("1", "2", "3")]
    assert len(parts) == (3 if chunk_size == 4096 else 0)  # of 10,240 bytes

    folder = Path(snapshot_download("org/model"))
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert folder.name == commit.oid
    for name, data in FILES.items():
        assert Path(hf_hub_download("org/model", name, force_download=True)).read_bytes() == data
    assert not hub.unknown


def test_upload_from_files_and_of_a_folder(api, hub, repo, tmp_path):
    hub.chunk_size = 4096
    for name, data in FILES.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(data)
    with open(tmp_path / "local" / "model.safetensors", "rb") as file:
        api.create_commit("org/model", [CommitOperationAdd("model.safetensors", file)], commit_message="one")
    api.upload_folder(repo_id="org/model", folder_path=tmp_path / "local")
    assert uploaded(repo) == FILES
    assert not hub.unknown


def test_identifiers_are_those_of_git_and_lfs(api, repo):
    content = b"hello\n"
    api.create_commit("org/model", additions({"a/hello.txt": content, "b.bin": content}), commit_message="two")
    text, binary = api.get_paths_info("org/model", ["a/hello.txt", "b.bin", "c.txt"])
    # `git hash-object` of the file, and of LFS's pointer to it.
    assert (text.blob_id, text.size, text.lfs) == ("ce013625030ba8dba906f756967f9e9ca394464a", 6, None)
    assert binary.blob_id == "fa61e1ef71c9908c0926776a4aa3504b3a27f159"
    assert binary.lfs.sha256 == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    tree = {entry.path: entry for entry in api.list_repo_tree("org/model", recursive=True)}
    assert set(tree) == {".gitattributes", "a", "a/hello.txt", "b.bin"}
    assert tree["b.bin"].lfs == binary.lfs and tree["a/hello.txt"].blob_id == text.blob_id
    assert {entry.path for entry in api.list_repo_tree("org/model")} == {".gitattributes", "a", "b.bin"}
    assert [entry.path for entry in api.list_repo_tree("org/model", "a")] == ["a/hello.txt"]
    siblings = {file.rfilename: file for file in api.model_info("org/model", files_metadata=True).siblings}
    assert siblings["b.bin"].blob_id == binary.blob_id and siblings["b.bin"].lfs.sha256 == binary.lfs.sha256
    assert api.verify_repo_checksums("org/model", local_dir=snapshot_download("org/model")).checked_count == 3


def test_lfs_file_of_another_kind_is_named_in_gitattributes(full):
    lines = full.head().files[".gitattributes"].decode().splitlines()
    assert lines[-1] == "assets/plot.png filter=lfs diff=lfs merge=lfs -text"
    assert sum("safetensors" in line for line in lines) == 1


# Commits


def test_commit_on_a_head_that_has_moved(api, full):
    parent = full.head().oid
    theirs = full.push({"theirs.txt": b"theirs"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit("org/model", additions({"a.txt": b"a"}), commit_message="late", parent_commit=parent)
    assert error.value.response.status_code == 412
    assert full.head() is theirs
    api.create_commit("org/model", additions({"a.txt": b"a"}), commit_message="again", parent_commit=theirs.oid)
    assert full.head().files["a.txt"] == b"a" and full.head().files["theirs.txt"] == b"theirs"


def test_head_that_moves_during_a_push(api, hub, full):
    parent = full.head().oid
    hub.before("*/commit/main", lambda: full.push({"theirs.txt": b"theirs"}))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit("org/model", additions({"a.bin": b"a"}), commit_message="mine", parent_commit=parent)
    assert "a.bin" not in full.head().files and full.head().files["theirs.txt"] == b"theirs"
    parent = full.head().oid
    api.create_commit("org/model", additions({"a.bin": b"a"}), commit_message="mine", parent_commit=parent)
    assert full.head().files["a.bin"] == b"a"


def test_commit_without_a_change_is_none(api, hub, full):
    head, commits = full.head().oid, len(full.branches["main"])
    assert api.create_commit("org/model", additions(FILES), commit_message="the same").oid == head
    assert len(full.branches["main"]) == commits
    hub.requests.clear()
    changed = {**FILES, "config.json": b"{}"}
    api.create_commit("org/model", additions(changed), commit_message="one file")
    assert uploaded(full) == changed
    assert not paths(hub, "PUT")  # what the storage has already is not uploaded again


def test_deletions(api, full):
    api.create_commit(
        "org/model", [CommitOperationDelete("assets/"), CommitOperationDelete("empty.txt")], commit_message="-"
    )
    assert set(uploaded(full)) == {"README.md", "config.json", "model.safetensors", "1_Pooling/config.json"}
    for path in ("nothing.txt", "nothing/", "1_Pooling"):
        with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
            api.create_commit("org/model", [CommitOperationDelete(path)], commit_message="-")


def test_pointer_without_content_is_refused(hub, repo, api):
    lines = [
        {"key": "header", "value": {"summary": "a pointer", "description": ""}},
        {"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}},
        {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 3}},
    ]
    head = repo.head()
    response = get_session().post(
        f"{hub.endpoint}/api/models/org/model/commit/main",
        content="\n".join(map(json.dumps, lines)).encode(),
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert response.status_code == 400 and "model.safetensors" in response.json()["error"]
    assert repo.head() is head


def test_storage_refuses_another_content(api, hub, repo):
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": "0" * 64, "size": 5}]}
    headers = {"Authorization": f"Bearer {hub.token}"}
    url = f"{hub.endpoint}/org/model.git/info/lfs/objects"
    actions = get_session().post(f"{url}/batch", json=batch, headers=headers).json()["objects"][0]["actions"]
    assert get_session().put(actions["upload"]["href"], content=b"other").status_code == 400
    assert get_session().post(actions["verify"]["href"], json=batch["objects"][0], headers=headers).status_code == 404
    assert not repo.objects


def test_files_that_gitignore_names_stay_out(api, repo):
    files = {".gitignore": b"*.log\nruns/*\n", "a.log": b"log", "runs/b.bin": b"run", "c.txt": b"c"}
    api.create_commit("org/model", additions(files), commit_message="files")
    assert set(uploaded(repo)) == {".gitignore", "c.txt"}


def test_branches(api, hub, full):
    head = full.head()
    api.create_branch("org/model", branch="draft/1")
    with pytest.raises(HfHubHTTPError, match="Reference already exists"):
        api.create_branch("org/model", branch="draft/1")
    api.create_branch("org/model", branch="draft/1", exist_ok=True)
    api.create_commit("org/model", additions({"a.txt": b"a"}), commit_message="draft", revision="draft/1")
    assert full.head() is head and full.head("draft/1").files["a.txt"] == b"a"
    refs = {ref.name: ref.target_commit for ref in api.list_repo_refs("org/model").branches}
    assert refs == {"main": head.oid, "draft/1": full.head("draft/1").oid}
    assert Path(hf_hub_download("org/model", "a.txt", revision="draft/1")).read_bytes() == b"a"
    assert Path(hf_hub_download("org/model", "a.txt", revision=refs["draft/1"])).read_bytes() == b"a"
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/model", "a.txt")
    api.create_branch("org/model", branch="old", revision=full.branches["main"][0].oid)
    assert api.list_repo_files("org/model", revision="old") == [".gitattributes"]
    for name in ("none", "0" * 40):
        with pytest.raises(RevisionNotFoundError, match="Invalid rev id"):
            api.model_info("org/model", revision=name)
        with pytest.raises(RevisionNotFoundError):
            api.create_commit("org/model", additions({"b.txt": b"b"}), commit_message="lost", revision=name)
    assert not hub.unknown


# Loading


def test_information(api, full):
    info = api.model_info("org/model")
    assert (info.id, info.sha, info.private, info.author) == ("org/model", full.head().oid, False, "org")
    assert (info.tags, info.library_name, info.card_data.license) == (["cocoa"], "sentence-transformers", "apache-2.0")
    assert {file.rfilename for file in info.siblings} == {*FILES, ".gitattributes"}
    assert api.file_exists("org/model", "assets/plot.png") and not api.file_exists("org/model", "assets/none.png")
    assert api.model_info("org/model", revision=full.branches["main"][0].oid).siblings[0].rfilename == ".gitattributes"


@pytest.mark.parametrize(("repo_type", "options"), [("dataset", {}), ("space", {"space_sdk": "gradio"})])
def test_datasets_and_spaces(api, hub, repo_type, options):
    api.create_repo("org/other", repo_type=repo_type, **options)
    files = {"README.md": README, "data.zip": b"PK", "app.py": b"print()"}
    commit = api.create_commit("org/other", additions(files), commit_message="files", repo_type=repo_type)
    assert commit.repo_url.repo_type == repo_type
    assert api.repo_info("org/other", repo_type=repo_type).sha == commit.oid
    folder = Path(snapshot_download("org/other", repo_type=repo_type))
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert not hub.unknown


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_metadata_and_ranges(api, hub, full, name):
    data, blob = FILES[name], full.head().blobs[name]
    url = hf_hub_url("org/model", name)
    metadata = get_hf_file_metadata(url)
    assert (metadata.size, metadata.commit_hash) == (len(data), full.head().oid)
    assert metadata.etag == (blob.sha256 if blob.lfs else blob.oid)
    for asked, got in {
        "bytes=2-4": data[2:5],
        "bytes=3-": data[3:],
        "bytes=-2": data[-2:],
        "bytes=1-9999999": data[1:],
    }.items():
        response = get_session().get(url, headers={"Range": asked})
        assert (response.status_code, response.content) == (206, got)
        assert response.headers["Content-Range"].endswith(f"/{len(data)}")
    assert get_session().get(url, headers={"Range": f"bytes={len(data)}-"}).status_code == 416


def test_card_is_validated(api, hub, repo):
    result = "{task: {type: t}, dataset: {type: d, name: d}, metrics: [{type: a, value: 1}]}"
    results = f"model-index: [{{name: m, results: [{result}]}}]"
    good = f"---\nlicense: mit\n{results}\n---\n"
    api.create_commit("org/model", additions({"README.md": good.encode()}), commit_message="good")
    for head, message in {
        "license: [": "Invalid metadata",
        "license: free-for-all": '"license" must be one of',
        results.replace("task: {type: t}", "no: task"): "task",
    }.items():
        with pytest.raises(ValueError, match=message):
            api.create_commit(
                "org/model", additions({"README.md": f"---\n{head}\n---\n".encode()}), commit_message="m"
            )
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.create_commit("org/model", additions({"README.md": b"# A model\n"}), commit_message="no head")
    assert uploaded(repo) == {"README.md": b"# A model\n"}


# Faults


def test_expired_and_wrong_tokens(api, hub, full):
    head = full.head()
    wrong = HfApi(token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header"):
        wrong.model_info("org/model")  # although it is public
    hub.revoke()
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami()
    with pytest.raises(HfHubHTTPError, match='User Access Token "loopback" is expired') as error:
        api.create_repo("org/model", exist_ok=True)
    assert error.value.response.status_code == 401
    # As from the real Hub, the client says that there is no such repository.
    with pytest.raises(RepositoryNotFoundError, match='User Access Token "loopback" is expired'):
        api.create_commit("org/model", additions({"a.txt": b"a"}), commit_message="expired")
    assert full.head() is head
    assert HfApi(token=False).model_info("org/model").sha == head.oid


def test_token_that_expires_during_a_push(api, hub, repo):
    head = repo.head()
    hub.before("*/commit/*", hub.revoke)
    with pytest.raises(HfHubHTTPError, match="is expired"):
        api.create_commit("org/model", additions(FILES), commit_message="files")
    assert repo.head() is head


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("POST", "*/preupload/*"),
        ("POST", "*/objects/batch"),
        ("PUT", "/storage/*"),
        ("POST", "/api/complete_multipart/*"),
        ("POST", "*/objects/verify"),
    ],
)
def test_errors_that_the_client_sits_out(api, hub, repo, method, pattern):
    hub.chunk_size = 4096
    hub.fail(method, pattern, status=500, times=3)
    api.create_commit("org/model", additions(FILES), commit_message="files")
    assert uploaded(repo) == FILES


def test_errors_that_do_not_end(api, hub, repo):
    head = repo.head()
    hub.fail("PUT", "/storage/*", status=503, times=100)
    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        api.create_commit("org/model", additions({"model.safetensors": b"weights"}), commit_message="files")
    assert error.value.__cause__.response.status_code == 503
    assert repo.head() is head and not repo.objects
    assert len(paths(hub, "PUT")) == 6  # once, and five times again


def test_error_of_the_commit_itself(api, hub, repo):
    hub.fail("POST", "*/commit/main")
    with pytest.raises(HfHubHTTPError, match="500 Internal Server Error"):
        api.create_commit("org/model", additions(FILES), commit_message="files")
    assert uploaded(repo) == {}
    hub.requests.clear()
    api.create_commit("org/model", additions(FILES), commit_message="files")
    assert uploaded(repo) == FILES
    assert not paths(hub, "PUT")  # the storage has them from the first time


def test_connection_cut_in_an_upload(api, hub, repo):
    files = {"model.safetensors": os.urandom(4_000_000)}
    hub.cut("/storage/*", after_bytes=100_000)
    api.create_commit("org/model", additions(files), commit_message="files")
    assert uploaded(repo) == files
    assert len(paths(hub, "PUT")) == 2


def test_connection_cut_again_and_again(api, hub, repo):
    head, files = repo.head(), {"model.safetensors": os.urandom(4_000_000), "config.json": b"{}"}
    hub.cut("/storage/*", after_bytes=100_000, times=100)
    with pytest.raises(RuntimeError, match="Error while uploading 'model.safetensors' to the Hub"):
        api.create_commit("org/model", additions(files), commit_message="files")
    assert repo.head() is head and not repo.objects
    hub.heal()
    api.create_commit("org/model", additions(files), commit_message="files")
    assert uploaded(repo) == files


def test_connection_cut_at_the_commit(api, hub, repo):
    head = repo.head()
    hub.cut("*/commit/main", after_bytes=10)
    with pytest.raises(Exception, match="disconnected|reset"):
        api.create_commit("org/model", additions(FILES), commit_message="files")
    assert repo.head() is head


def test_what_is_not_known_is_kept(api, hub, full):
    with pytest.raises(HfHubHTTPError, match="does not know GET /api/models/org/model/commits/main"):
        api.list_repo_commits("org/model")
    with pytest.raises(HfHubHTTPError, match="does not know POST"):
        api.create_commit("org/model", additions({"a.txt": b"a"}), commit_message="m", create_pr=True)
    assert hub.unknown == [
        ("GET", "/api/models/org/model/commits/main"),
        ("POST", "/api/models/org/model/preupload/main"),
    ]


# The whole way


PUSH_AND_LOAD = """
import sys
import numpy as np
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi
from sentence_transformers import SentenceTransformer

folder = Path(sys.argv[1])
files = [path for path in folder.rglob("*") if path.is_file()]
api = HfApi()
api.create_repo("org/cocoa-tiny", private=True)
head = api.model_info("org/cocoa-tiny").sha
additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
api.create_commit("org/cocoa-tiny", additions, commit_message="cocoa-tiny", parent_commit=head)
texts = ["a cat with heart eyes", "rain"]
local = SentenceTransformer(str(folder)).encode(texts)
stock = SentenceTransformer("org/cocoa-tiny")
ours = SentenceTransformer("org/cocoa-tiny", trust_remote_code=True)
print(type(stock.transformers_model).__module__, type(ours.transformers_model).__module__)
print(*(np.abs(model.encode(texts) - local).max() for model in (stock, ours)))
"""


def test_checkpoint_is_pushed_and_loaded_by_a_fresh_process(hub, hub_environment, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PUSH_AND_LOAD, str(CHECKPOINT)],
        env=hub_environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-8000:]
    modules, differences = result.stdout.splitlines()[-2:]
    stock, ours = modules.split()
    assert stock.startswith("transformers.models.") and ours.startswith("transformers_modules.org.")
    assert all(float(difference) <= 1e-6 for difference in differences.split())
    files = {
        path.relative_to(CHECKPOINT).as_posix(): path.read_bytes() for path in CHECKPOINT.rglob("*") if path.is_file()
    }
    assert uploaded(hub.repository("org/cocoa-tiny")) == files
    assert not hub.unknown
