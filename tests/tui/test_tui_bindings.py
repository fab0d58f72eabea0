"""Every key and command of the TUI by its name, and the test that uses it: a new one without a test fails."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

from textual.binding import Binding

from mobile_gguf import tui
from mobile_gguf.tui.commands.slash import COMMANDS

# Which test presses a binding (its id) or sends a command.
CHAT, ACTIONS, JOBS = "test_tui_chat", "test_tui_actions", "test_tui_jobs"
CONVERSATIONS, MAP, ENDS = "test_tui_conversations", "test_tui_map", "test_tui_ends"
TESTED = {
    "app.help": (ACTIONS, "test_a_key_opens_a_screen_and_escape_leaves_it"),
    "app.quit": (JOBS, "test_quitting_while_a_job_runs_asks_once_and_ends_it"),
    "app.interrupt": (ACTIONS, "test_the_second_keys_do_what_the_first_do"),
    "app.palette": (ACTIONS, "test_the_second_keys_do_what_the_first_do"),
    "app.suspend": (ENDS, "test_ctrl_z_without_a_shell_says_so_and_undo_has_another_key"),
    "chat.models": (ACTIONS, "test_a_model_is_picked"),
    "chat.find": (ACTIONS, "test_a_key_opens_a_screen_and_escape_leaves_it"),
    "chat.settings": (ACTIONS, "test_settings_are_changed_reset_and_loaded"),
    "chat.new": (CONVERSATIONS, "test_conversations_are_found_opened_renamed_and_deleted"),
    "chat.map": (MAP, "test_a_hidden_map_costs_nothing"),
    "chat.tokens": (MAP, "test_tokens_are_coloured_by_their_pass"),
    "chat.regenerate": (CHAT, "test_an_answer_is_made_again"),
    "chat.jobs": (JOBS, "test_a_job_runs_while_one_chats"),
    "chat.full_map": (ACTIONS, "test_the_full_map_is_left_by_any_key_that_opens_a_map"),
    "chat.edit": (CHAT, "test_a_question_is_edited_and_sent_again"),
    "chat.stop": (CHAT, "test_an_answer_can_be_stopped_and_keeps_what_it_said"),
    "chat.page_up": (ACTIONS, "test_the_pages_of_a_long_answer"),
    "chat.page_down": (ACTIONS, "test_the_pages_of_a_long_answer"),
    "confirm.yes": (CONVERSATIONS, "test_conversations_are_found_opened_renamed_and_deleted"),
    "confirm.no": (ACTIONS, "test_a_question_is_answered_no_by_its_key_and_its_button"),
    "conversations.list": (ACTIONS, "test_the_list_of_conversations_has_the_arrow_keys"),
    "conversations.rename": (CONVERSATIONS, "test_conversations_are_found_opened_renamed_and_deleted"),
    "conversations.delete": (CONVERSATIONS, "test_conversations_are_found_opened_renamed_and_deleted"),
    "dialog.close": (ACTIONS, "test_a_key_opens_a_screen_and_escape_leaves_it"),
    "jobs.cancel": (JOBS, "test_a_job_is_cancelled"),
    "map.close": (ACTIONS, "test_the_full_map_is_left_by_any_key_that_opens_a_map"),
    "models.list": (ACTIONS, "test_a_model_is_picked"),
    "settings.reload": (ACTIONS, "test_settings_are_changed_reset_and_loaded"),
    "settings.default": (ACTIONS, "test_settings_are_changed_reset_and_loaded"),
    "prompt.submit": (CHAT, "test_an_answer_is_shown_saved_and_has_a_receipt"),
    "prompt.newline": (CHAT, "test_lines_are_begun_by_ctrl_j_shift_enter_and_a_backslash"),
    "prompt.undo": (ENDS, "test_ctrl_z_without_a_shell_says_so_and_undo_has_another_key"),
    "question.edit": (ACTIONS, "test_what_is_in_the_transcript_has_keys"),
    "question.copy": (CHAT, "test_what_is_copied"),
    "answer.copy": (ACTIONS, "test_what_is_in_the_transcript_has_keys"),
    "answer.copy_code": (CHAT, "test_what_is_copied"),
    "answer.thoughts": (ACTIONS, "test_thoughts_are_folded_until_a_key_opens_them"),
    "answer.regenerate": (CHAT, "test_an_answer_is_made_again"),
    **dict.fromkeys(
        ("/help", "/model", "/search", "/settings", "/stats", "/jobs"),
        (ACTIONS, "test_a_command_opens_a_screen"),
    ),
    **dict.fromkeys(
        ("/new", "/system", "/reload", "/map", "/tokens", "/edit", "/stop", "/regenerate"),
        (ACTIONS, "test_commands_without_a_screen_do_what_they_say"),
    ),
    "/theme": (ACTIONS, "test_commands_without_a_screen_do_what_they_say"),
    "/quit": (ACTIONS, "test_commands_without_a_screen_do_what_they_say"),
    "/preset": ("test_tui_attached", "test_a_preset_in_the_chat"),
    **dict.fromkeys(("/pull", "/convert", "/calibrate"), (JOBS, "test_a_job_runs_while_one_chats")),
    "/rename": (CONVERSATIONS, "test_conversations_are_found_opened_renamed_and_deleted"),
    "/delete": (CONVERSATIONS, "test_conversations_are_found_opened_renamed_and_deleted"),
    "/export": (CONVERSATIONS, "test_an_export_is_markdown"),
    "/save": (CONVERSATIONS, "test_conversations_that_cannot_be_saved_stay_on_the_screen"),
    "/set": (CHAT, "test_settings_count_from_the_next_answer_on"),
    "/copy": (CHAT, "test_what_is_copied"),
}


def all_bindings():
    """The bindings of every class of the package, by id."""
    found = {}
    for module in pkgutil.walk_packages(tui.__path__, "mobile_gguf.tui."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and value.__module__.startswith("mobile_gguf.tui"):
                for binding in value.__dict__.get("BINDINGS", ()):
                    assert isinstance(binding, Binding)
                    found[binding.id] = binding
    return found


def test_every_binding_and_every_command_is_exercised_by_name():
    assert sorted(TESTED) == sorted([*all_bindings(), *(command.name for command in COMMANDS)])
    for module, name in set(TESTED.values()):
        tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
        functions = {
            node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in functions, name
