"""`{% load form_field %} {% form_field form.email %}`: label, input, help and errors of one field, tied together."""

from __future__ import annotations

from typing import Any

from django import forms, template
from django.forms import BoundField

register = template.Library()


@register.inclusion_tag("account/field.html")
def form_field(field: BoundField) -> dict[str, Any]:
    widget = field.field.widget
    css = "form-control"
    if isinstance(widget, forms.Select):
        css = "form-select"
    elif isinstance(widget, forms.CheckboxInput):
        css = "form-check-input"
    # allauth repeats the label as a placeholder, which goes away just when it is wanted. Django ties help and errors
    # to the input by aria-describedby itself.
    return {"field": field, "input": field.as_widget(attrs={"class": css, "placeholder": False})}
