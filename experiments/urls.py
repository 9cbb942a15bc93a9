"""The site map of experiments and of the hosts that they train on."""

from django.urls import path

from experiments import views

urlpatterns = [
    path("", views.home, name="home"),
    path("train/", views.train, name="train"),
    path("train/estimate/", views.train_estimate, name="train_estimate"),
    path("profile/", views.profile, name="profile"),
    path("experiments/<uuid:pk>/", views.experiment, name="experiment"),
    path("experiments/<uuid:pk>/metrics.json", views.metrics, name="metrics"),
    path("experiments/<uuid:pk>/metrics.csv", views.metrics_csv, name="metrics_csv"),
    path("experiments/<uuid:pk>/spec.json", views.spec_json, name="spec_json"),
    path("experiments/<uuid:pk>/edit/", views.edit, name="edit"),
    path("experiments/<uuid:pk>/stop/", views.stop, name="stop"),
    path("experiments/<uuid:pk>/resume/", views.resume, name="resume"),
    path("experiments/<uuid:pk>/delete/", views.delete, name="delete"),
    path("experiments/<uuid:pk>/<slug:name>/log/", views.log, name="log"),
    path("experiments/<uuid:pk>/<slug:name>/checkpoint/<slug:checkpoint>/", views.checkpoint, name="checkpoint"),
    path("experiments/<uuid:pk>/<slug:name>/fetch/<slug:checkpoint>/", views.fetch, name="fetch"),
    path("hosts/", views.hosts, name="hosts"),
    path("hosts/add/", views.host_add, name="host_add"),
    path("hosts/<int:pk>/", views.host, name="host"),
    path("hosts/<int:pk>/edit/", views.host_edit, name="host_edit"),
    path("hosts/<int:pk>/confirm/", views.host_confirm, name="host_confirm"),
    path("hosts/<int:pk>/credential/", views.host_credential, name="host_credential"),
    path("hosts/<int:pk>/look/", views.host_look, name="host_look"),
    path("hosts/<int:pk>/set-up/", views.host_set_up, name="host_set_up"),
    path("hosts/<int:pk>/task/<int:task>/cancel/", views.host_task_cancel, name="host_task_cancel"),
    path("hosts/<int:pk>/offer/", views.host_offer, name="host_offer"),
    path("hosts/<int:pk>/delete/", views.host_delete, name="host_delete"),
    path("docs/", views.docs, name="docs"),
    path("docs/<slug:page>/", views.docs, name="docs_page"),
]
