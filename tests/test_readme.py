"""What the README names is there."""
import re

from loading import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_every_link_leads_to_a_file():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_workflow_of_the_table_exists_and_the_table_names_every_workflow():
    rows = re.search(r"\| mechanism \|.*?\n\n", TEXT, re.DOTALL)[0].splitlines()[2:]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.rstrip("|").rpartition("|")[2])}
    assert named == {path.stem for path in (ROOT / "workflows").glob("*.json")}
