"""`marginroute inspect`: the card of a good bundle; exit code 2 and one sentence for any other."""

import json
import shutil
import subprocess
import sys

import pytest

from marginroute.__main__ import main
from marginroute.bundle_files import digest_of


def change_a_term(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["terms"]["standard"]["refund_share"] = 0.5
    path.write_text(json.dumps(manifest))


def truncate(folder):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])


def other_feature_version(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["feature_version"] = 99
    path.write_text(json.dumps(manifest))


def binary(folder):
    (folder / "manifest.json").write_bytes(bytes(range(256)))


def rewritten(change):
    """Changes the manifest and signs it again."""

    def spoil(folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))

    return spoil


UNFIT = {
    "holds a NaN": lambda m: m["static_signals"][9].__setitem__(0, "NaN"),
    "static_signals is": lambda m: m["static_signals"].pop(),
    "output_tokens is": lambda m: m["output_tokens"].pop(),
    "slots is": lambda m: m["slots"].pop(),
    "no terms of class 'premium'": lambda m: m["terms"].pop("premium"),
    "not replicas, then": lambda m: m["layout"]["kind"].__setitem__(0, 9),
    "names are not all different": lambda m: m["layout"]["names"].__setitem__(1, "small/0"),
    "of a tier": lambda m: m["layout"]["tier"].__setitem__(0, 55),
    "of a pool": lambda m: m["layout"]["station"].__setitem__(0, 55),
    "not of its": lambda m: m["layout"]["tier"].pop(),
    "lacks something": lambda m: m.__setitem__("scenario", None),
}


@pytest.mark.parametrize("words", UNFIT)
def test_a_signed_manifest_that_describes_no_fleet_is_refused(bundle_folder, tmp_path, capsys, words):
    folder = shutil.copytree(bundle_folder, tmp_path / "unfit")
    rewritten(UNFIT[words])(folder)
    assert main(["inspect", str(folder)]) == 2
    assert words in capsys.readouterr().err


def test_card_names_what_matters(bundle_folder, capsys):
    assert main(["inspect", str(bundle_folder)]) == 0
    card = capsys.readouterr().out
    for words in ("verified", "bid-price", "small/0", "tier large", "premium", "least-in-flight", "margin_usd_per_1k"):
        assert words in card
    assert "{" not in card


@pytest.mark.parametrize("spoil", [change_a_term, truncate, other_feature_version, binary])
def test_spoilt_bundle_is_refused_in_one_sentence(bundle_folder, tmp_path, capsys, spoil):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_folder, folder)
    spoil(folder)
    assert main(["inspect", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "manifest.json" in err


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_missing_bundle_is_refused_in_one_sentence(tmp_path, capsys, name):
    (tmp_path / "file").write_text("not a folder")
    assert main(["inspect", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert name in err
    assert err.count("\n") == 1


def test_folder_without_manifest_is_called_so(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "manifest.json is missing" in capsys.readouterr().err


def test_module_runs(bundle_folder):
    run = [sys.executable, "-m", "marginroute", "inspect", str(bundle_folder)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Bundle ")


def test_help_needs_no_numpy():
    code = "import sys; sys.argv=['marginroute','--help'];\ntry:\n import marginroute.__main__ as m; m.main()\n"
    code += "except SystemExit: pass\nassert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=30)
