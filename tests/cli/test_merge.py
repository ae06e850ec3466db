"""`finetune merge --out`: the files that arrive in the folder."""

from types import SimpleNamespace

from finetune.cli import merge


def test_the_folder_has_every_template_and_nothing_of_the_store(tmp_path, monkeypatch):
    source = tmp_path / "merge"
    for name in ("config.json", "manifest.json", "lease.1.json", "additional_chat_templates/tool_use.jinja"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    stages = {"merge": {"path": str(source), "status": "done"}, "export": {"path": "", "status": "off"}}
    monkeypatch.setattr(merge.run_view, "read", lambda store, run: {"recipe": "a", "stages": stages})
    monkeypatch.setattr(merge, "publish_run", lambda run, **_: {"pushes": [{"card": "a card"}]})
    out = tmp_path / "out"
    merge.write_out(SimpleNamespace(artifacts=tmp_path, scratch=tmp_path), "a", out, SimpleNamespace(say=print))
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {"README.md", "config.json", "additional_chat_templates/tool_use.jinja"}
