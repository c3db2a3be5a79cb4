"""Tables of a user's folder: which lines of a CSV file are rows."""

import pytest

from mmjax.data import tables


@pytest.mark.parametrize(
    ('delimiter', 'blank'), [(',', '  '), (',', ' , '), ('|', '\t'), ('|', '')]
)
def test_lines_without_text_are_skipped_and_counted_as_lines(tmp_path, delimiter, blank):
    lines = [blank, 'id,word', blank, 'a,one', blank, 'b,', blank]
    text = '\n'.join(line if line == blank else line.replace(',', delimiter) for line in lines)
    (tmp_path / 'table.csv').write_text(text + '\n')
    rows = list(tables.csv_rows(tmp_path / 'table.csv', ['word', 'id'], delimiter=delimiter))
    assert rows == [(4, ['one', 'a'], ''), (6, ['', 'b'], 'has an empty word')]
