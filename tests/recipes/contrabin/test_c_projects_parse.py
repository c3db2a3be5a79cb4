"""Functions and comments of C text, and canonical binaries: by hand, and by a compiler."""

import shutil
import subprocess

import pytest

from mmjax.recipes.contrabin.c_projects import canonical, parse

pytest.importorskip('tree_sitter_c')
needs_gcc = pytest.mark.skipif(not shutil.which('gcc') or not shutil.which('objdump'), reason='gcc')

TEXT = b"""/*
 * shapes.c -- Copyright 2020 Nobody. Licensed to all.
 */
int first(void) { return 1; }

/**
 * \\brief Adds two numbers.
 *
 * @param a the first, mail@example.org
 * ==========================
 * @return the sum
 **/

static int *add(int a, int b) { return 0; }

/* far above */


int far(void) { return 2; }

// Looks up a key,
//   case folded.
int lookup(char *key) { return 3; }
int x; // not of the next
int next(void) { return 4; }
#if DEBUG
/* Prints. */
void print(void) { /* here */ puts("/* no */"); }
#else
void print(void) {}
#endif
extern "C" {
/* Is in C++. */
int (*table(int k))(int) { return 0; }
}
int inner(int a)
{
  /* Counts down
     to zero. */

  return a; /* kept */
}
int line_below(int a)
{
  /* the row */
  int row = a;
  return row;
}
/* Old style. */
int old(a, b) int a; char *b; { return a; }
int CALLED macro(int a) { return a; }
int wrong(int a) { return a +; }
/* int gone(void) {
     return 1;
   } */
int after_code(void) { return 1; }
/* {{{ Sorts the rows. }}} */
/* -------------------------------- */
void sort(void) {}
/* Section. */
// Describes it.
void styled(void) {}
struct s { int (*member)(void); };
int declared(void);
"""


def test_every_function_has_its_comment_and_no_other():
    found = {f.name: f for f in parse.functions(TEXT) if not f.fault}
    comments = {name: f.comment for name, f in found.items()}
    assert comments == {
        'first': '',
        'add': 'brief Adds two numbers. param a the first, mail@example.org return the sum',
        'far': '',
        'lookup': 'Looks up a key, case folded.',
        'next': '',
        'table': 'Is in C++.',
        'inner': 'Counts down to zero.',
        'line_below': '',
        'old': 'Old style.',
        'macro': '',
        'after_code': '',
        'sort': 'Sorts the rows.',
        'styled': 'Describes it.',
    }
    for f in found.values():
        text = TEXT[f.start : f.end].decode()
        assert f.source == text or f.name == 'inner'
    inner = ' '.join(found['inner'].source.split())
    assert inner == 'int inner(int a) { return a; /* kept */ }'
    assert found['lookup'].source == 'int lookup(char *key) { return 3; }'


def test_faulty_functions_are_told():
    faults = [(f.name, f.fault) for f in parse.functions(TEXT) if f.fault]
    assert faults == [
        ('print', 'defined_twice'),
        ('print', 'defined_twice'),
        ('wrong', 'parse_error'),
    ]


def test_a_brace_left_open_costs_one_function():
    text = b'#if A\nint f(int a) {\n#else\nint f(char a) {\n#endif\nreturn a; }\n/* Is g. */\n'
    found = parse.functions(text + b'int g(int a) { return a; }\n')
    assert [(f.name, f.comment) for f in found if not f.fault] == [('g', 'Is g.')]


def test_bytes_that_are_not_utf8_do_not_shift_the_rest():
    text = b'/* caf\xe9 */ int a;\n/* Br\xfccke. */\nint f(void) { return "\xff"[0]; }\n'
    (found,) = parse.functions(text)
    assert (found.comment, found.source) == ('Br\ufffdcke.', 'int f(void) { return "\ufffd"[0]; }')


def test_deep_nesting_does_not_end_the_reader():
    text = b'int f(void) { return ' + b'(' * 20_000 + b'1' + b')' * 20_000 + b'; }'
    assert [f.name for f in parse.functions(text)] == ['f']


def test_content_key_tells_twins():
    key = parse.content_key
    one = 'int f(int a) { /* why */ return f(a) + "f /* a */"[0]; } // end'
    assert key(one, 'f') == key('int  g(int a)\n{return g(a)+"f /* a */"[0];}', 'g')
    assert key(one, 'f') != key('int g(int a) { return g(a) + "g /* a */"[0]; }', 'g')
    assert key('int f(int ab)', 'f') != key('int f(int a b)', 'f')


LISTING = """
0000000000000000 <f>:
   0:	push   %rbp
   1:	lea    0x0(%rip),%rdi        # 8 <f+0x8>
			4: R_X86_64_PC32	.rodata.str1.1+0xc
   8:	callq  d <f+0xd>
			9: R_X86_64_PLT32	f.helper-0x4
   d:	movl   $0x0,0x0(%rip)        # 17 <f+0x17>
			f: R_X86_64_PC32	counter-0x8
  17:	jne    24 <f+0x24>
  19:	call   0 <f>
  1e:	data16 cs nopw 0x0(%rax,%rax,1)
  24:	xchg   %ax,%ax
  26:	cmp    $0x0,%r9d
  2a:	jle    0 <f>
  2c:	lea    -0x8(%rip),%rax        # 26 <f+0x26>
  33:	call   38 <f+0x38>
			34: R_X86_64_PLT32	f.helper-0x4

Disassembly of section .text.g:

0000000000000000 <g>:
   0:	ret
"""
ASSEMBLY = """L0:
push %rbp
lea G0(%rip),%rdi
call G1
movl $0x0,G2(%rip)
jne L1
call self
L1:
cmp $0x0,%r9d
jle L0
lea L1(%rip),%rax
call G1"""


def test_assembly_loses_addresses_names_and_padding():
    parts = canonical.split_assembly(LISTING)
    assert list(parts) == ['f', 'g']
    assert canonical.canonical_assembly(parts['f'], 'f') == ASSEMBLY
    assert canonical.count_instructions(ASSEMBLY) == 10
    assert canonical.canonical_assembly(parts['g'], 'g') == 'ret'


def test_assembly_keeps_names_and_classes_on_demand():
    lines = canonical.split_assembly(LISTING)['f']
    text = canonical.canonical_assembly(lines, 'f', symbols=True, registers='class')
    expected = ASSEMBLY.replace('G1', 'self.helper').replace('G2', 'counter')
    for name, kind in (('%rdi', '%r64'), ('%r9d', '%r32'), ('%rax', '%r64')):
        expected = expected.replace(name, kind)
    assert text == expected


MODULE = """
; Function Attrs: nounwind
define dso_local i32 @f(i32 noundef %0, %struct.node* %1) local_unnamed_addr #0 !dbg !7 {
  call void @llvm.dbg.value(metadata i32 %0, metadata !12, metadata !DIExpression()), !dbg !13
  %3 = load i32, i32* @count, align 4, !tbaa !5
  br i1 %2, label %9, label %4, !dbg !1, !llvm.loop !6
4:                                                ; preds = %2
  %5 = call i32 asm "add #5, f; nop", "=r,r"(i32 %3) #9, !srcloc !8
  %6 = call i32 @f(i8* getelementptr (i8, i8* @__func__.f, i64 0), %struct.node* %1)
  call void @llvm.memcpy.p0i8(i8* %5), !dbg !2
  %7 = call i32 @other(i32 %6) #3
  br label %9
9:
  %10 = phi i32 [ %3, %2 ], [ %7, %4 ]
  ret i32 %10
}

define internal void @"odd name"() {
  ret void
}
"""
LLVM = """define i32 @self(i32 %v0, %T0* %v1) {
%v2 = load i32, i32* @G0, align 4
br i1 %L0, label %L1, label %L2
L2:
%v3 = call i32 asm "add #5, self; nop", "=r,r"(i32 %v2)
%v4 = call i32 @self(i8* getelementptr (i8, i8* @G1, i64 0), %T0* %v1)
call void @llvm.memcpy.p0i8(i8* %v3)
%v5 = call i32 @G2(i32 %v4)
br label %L1
L1:
%v6 = phi i32 [ %v2, %L0 ], [ %v5, %L2 ]
ret i32 %v6
}"""


def test_llvm_loses_metadata_and_names():
    parts = canonical.split_llvm(MODULE)
    assert list(parts) == ['f', 'odd name']
    assert canonical.canonical_llvm(parts['f'], 'f') == LLVM
    named = canonical.canonical_llvm(parts['f'], 'f', symbols=True)
    expected = LLVM.replace('%T0', '%struct.node').replace('@G0', '@count')
    assert named == expected.replace('@G1', '@__func__.self').replace('@G2', '@other')
    assert canonical.count_instructions(LLVM) == 9


BODY = """
static int seen[4];
int NAME(int n, const char *text) {
  static int calls;
  for (int i = 0; i < n; i++) seen[i & 3] += text[i];
  switch (n) { case 1: return puts(__func__); case 2: return puts("b"); case 3: return abs(n);
    case 4: return seen[1]; case 5: return puts("c") + n; case 6: return calls++; }
  return n < 2 ? 1 : n * NAME(n - 1, text);
}
"""


@needs_gcc
@pytest.mark.parametrize('level', ['-O0', '-O2'])
def test_text_does_not_depend_on_the_name(tmp_path, level):
    """The same body as `f` and, behind another function, as `longer_name`."""
    texts = []
    for name, before in (('f', ''), ('longer_name', 'int other(int a) { return a / 3; }')):
        (tmp_path / 'a.c').write_text(before + BODY.replace('NAME', name))
        subprocess.run(['gcc', '-w', level, '-c', 'a.c'], cwd=tmp_path, check=True)
        command = ['objdump', '-d', '-r', '--no-show-raw-insn', 'a.o']
        listing = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        lines = canonical.split_assembly(listing.stdout)[name]
        texts.append(canonical.canonical_assembly(lines, name))
    assert texts[0] == texts[1]
    assert 'self' in texts[0] or level == '-O2'
    assert 'longer_name' not in texts[1] and '<' not in texts[1]
